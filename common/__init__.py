"""The small shared base beneath the per-task scripts: model, data path, training, evaluation."""

from .quiet import silence_known_messages

silence_known_messages()
