"""The application: a trainer for every method and composition, and the papers' experiments."""
