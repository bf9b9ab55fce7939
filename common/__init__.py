"""The small shared base beneath the per-task scripts: model, data path, training, evaluation."""
