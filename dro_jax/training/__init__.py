"""Training from arrays alone: state, mesh, optimisers, the jitted step, checkpoints and the loop."""
