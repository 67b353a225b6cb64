"""What a fully connected layer computes; knows no clock but for the trial that chooses."""
