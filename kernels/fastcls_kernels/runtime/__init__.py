"""What all operations share: where they run, what they check, which tile they take."""
