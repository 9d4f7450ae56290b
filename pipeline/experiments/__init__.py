"""What runs the graph: the check before it, its runner, training seeds, ablations, the gate."""
