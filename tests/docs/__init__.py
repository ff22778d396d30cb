"""What a reader sees runs: documents, doctests, notebooks, examples, the wheel."""
