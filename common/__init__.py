"""The small shared base beneath the per-task scripts: model, data path, training, evaluation."""

from .launcher import end_with_launcher

end_with_launcher()

from .quiet import silence_known_messages  # noqa: E402 (it imports torch)

silence_known_messages()
