"""The small models for demo and tests, with shipped weights. They import nothing of fastlora."""
