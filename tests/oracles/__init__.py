"""What the library is compared with: problems, and the methods once more in NumPy."""
