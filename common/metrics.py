"""Scores: ANLS in the official and in the recipe's variant, accuracy after normalisation, AUROC."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein
from sklearn.metrics import roc_auc_score

THRESHOLD = 0.5


def anls(prediction: str, accepted: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer, as the official DocVQA evaluation defines it.

    Case-insensitive, runs of white space folded into one space; the best of the accepted answers;
    0 where the similarity is under 0.5 (Biten et al., Scene Text Visual Question Answering, 2019).

    Args:
        prediction: the generated answer.
        accepted: the accepted answers; none gives 0.

    Returns:
        0, or a similarity from 0.5 to 1.
    """

    def normalize(text: str) -> str:
        return " ".join(text.split()).lower()

    best = 0.0
    for answer in accepted:
        similarity = Levenshtein.normalized_similarity(normalize(prediction), normalize(answer))
        best = max(best, similarity)
    return best if best >= THRESHOLD else 0.0


def anls_recipe(prediction: str, accepted: Sequence[str]) -> float:
    """The variant behind the published tables.

    Case counts; the prediction is stripped of white space and full stops; an answer counts only
    where the normalised distance is strictly under 0.5; an empty prediction scores 0.
    """
    prediction = strip_answer(prediction)
    if not prediction:
        return 0.0
    distances = [Levenshtein.normalized_distance(prediction, answer) for answer in accepted]
    return max((1 - distance for distance in distances if distance < THRESHOLD), default=0.0)


def exact_match(prediction: str, answer: str) -> float:
    """1 where both are equal after the same normalisation (white space and full stops stripped, lower case)."""
    return float(strip_answer(prediction).lower() == strip_answer(answer).lower())


def auroc(labels: Sequence[bool], probabilities: Sequence[float]) -> float | None:
    """Area under the ROC curve; None where all labels are the same, for which it is not defined.

    Args:
        labels: True where the answer is yes.
        probabilities: of yes.
    """
    return float(roc_auc_score(labels, probabilities)) if len(set(labels)) == 2 else None


def strip_answer(text: str) -> str:
    """Without white space and full stops around it, in any order ("Yes. " -> "Yes")."""
    return text.strip(" \t\n\r\f\v.")


def mean(scores: Sequence[float]) -> float:
    """The mean; 0 for no scores."""
    return sum(scores) / len(scores) if scores else 0.0
