"""The tests, one folder for each part of the library, and what they compare it with."""
