"""The small models for demo and tests, with their shipped weights. They import nothing of fastlora."""
