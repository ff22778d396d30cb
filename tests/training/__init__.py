"""Training steps, on plain trees and in Flax."""
