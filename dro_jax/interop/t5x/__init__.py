"""T5X: alignment by its own `train`, `eval` and `infer`, which needs it, and its checkpoints, which do not."""
