"""What is drawn for a sample: its key and random streams, the plan of its views, its captions."""
