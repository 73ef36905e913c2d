"""SimSiam in PyTorch: the truth this project's engine is measured against, and the baseline it is timed against."""
