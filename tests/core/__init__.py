"""The combinator, its parts, the named methods."""
