"""What a run will take, before it begins: its work is counted, and a little of each kind is timed on the model at hand."""
