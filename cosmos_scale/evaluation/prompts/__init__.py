"""What classes are called, and the sentences that their names are put into."""
