"""Slow NumPy reference of the metrics: loops over samples, written from the definitions."""

from itertools import combinations

import numpy as np


def softmax(logits):
    """p_k = exp(z_k) / Σ_j exp(z_j) for one sample, logits (K,)."""
    powers = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits))
    return powers / powers.sum()


def nll(logits, labels):
    return np.mean([-np.log(softmax(z)[y]) for z, y in zip(logits, labels, strict=True)])


def brier(logits, labels):
    total = 0.0
    for z, y in zip(logits, labels, strict=True):
        for k, probability in enumerate(softmax(z)):
            total += (probability - (k == y)) ** 2
    return total / len(labels)


def top(logits, labels):
    """Confidence and correctness of each sample's most likely class, the first of ties."""
    confidence = np.array([softmax(z).max() for z in logits])
    correct = np.array([int(np.argmax(z)) == y for z, y in zip(logits, labels, strict=True)])
    return confidence, correct


def balanced_accuracy(logits, labels):
    shares = []
    for label in sorted(set(labels.tolist())):
        hits = [
            int(np.argmax(z)) == label for z, y in zip(logits, labels, strict=True) if y == label
        ]
        shares.append(sum(hits) / len(hits))
    return sum(shares) / len(shares)


def top5(logits, labels):
    """Accuracy of the five most likely classes; of tied classes, the first ranks higher."""
    hits = 0
    for z, y in zip(logits, labels, strict=True):
        ranking = sorted(range(len(z)), key=lambda k, z=z: (-z[k], k))
        hits += int(y) in ranking[:5]
    return hits / len(labels)


def bins(confidence, correct, num_bins=15):
    """Count, mean confidence and accuracy of each bin (q/Q, (q + 1)/Q]; the first includes 0."""
    rows = []
    for q in range(num_bins):
        low = -1 if q == 0 else q / num_bins
        inside = [i for i, c in enumerate(confidence) if low < c <= (q + 1) / num_bins]
        means = (confidence[inside].mean(), correct[inside].mean()) if inside else (0, 0)
        rows.append((len(inside), *means))
    return rows


def ece(confidence, correct, num_bins=15):
    rows = bins(confidence, correct, num_bins)
    return sum(n * abs(accuracy - mean) for n, mean, accuracy in rows) / len(confidence)


def tace(logits, labels, num_bins=15, threshold=1e-3):
    probabilities = np.array([softmax(z) for z in logits])
    num_samples, num_classes = probabilities.shape
    total = 0.0
    for k in range(num_classes):
        above_threshold = [(p, y == k) for p, y in zip(probabilities[:, k], labels, strict=True)]
        above_threshold = sorted(
            (pair for pair in above_threshold if pair[0] > threshold), key=lambda pair: pair[0]
        )
        size = len(above_threshold) // num_bins
        for q in range(num_bins):
            group = (
                above_threshold[q * size :]
                if q == num_bins - 1
                else above_threshold[q * size : (q + 1) * size]
            )
            if group:
                gap = np.mean([p for p, _ in group]) - np.mean([hit for _, hit in group])
                total += len(group) * abs(gap)
    return total / (num_samples * num_classes)


def temperature_error(logits, temperature):
    """1 / sqrt of the Fisher information of log T: variances of z/T under softmax(z/T), summed."""
    information = 0.0
    for row in logits / temperature:
        p = softmax(row)
        information += (p * row**2).sum() - (p * row).sum() ** 2
    return information**-0.5


def temperature(logits, labels, low=1e-3, high=1e3):
    """Bisect the slope of the NLL over s = 1 / T, to rounding precision."""

    def slope(s):
        return np.mean(
            [softmax(s * (z - z[y])) @ (z - z[y]) for z, y in zip(logits, labels, strict=True)]
        )

    smallest, largest = 1 / high, 1 / low
    if slope(smallest) > 0:
        return high
    if slope(largest) < 0:
        return low
    for _ in range(70):
        middle = np.sqrt(smallest * largest)
        smallest, largest = (smallest, middle) if slope(middle) > 0 else (middle, largest)
    return 1 / middle


def member_accuracy(member_logits, labels):
    num_members = member_logits.shape[1]
    return [np.mean(member_logits[:, m].argmax(1) == labels) for m in range(num_members)]


def ratio_error(member_logits, labels):
    ratios = []
    for i, j in combinations(range(member_logits.shape[1]), 2):
        one_wrong = both_wrong = 0
        for logits, y in zip(member_logits, labels, strict=True):
            wrong = [int(np.argmax(logits[m])) != y for m in (i, j)]
            one_wrong += sum(wrong) == 1
            both_wrong += sum(wrong) == 2
        ratios.append(one_wrong / both_wrong)
    return np.mean(ratios)


def disagreement(member_logits):
    fractions = []
    for i, j in combinations(range(member_logits.shape[1]), 2):
        fractions.append(np.mean([np.argmax(row[i]) != np.argmax(row[j]) for row in member_logits]))
    return np.mean(fractions)


def entropy(probabilities):
    return -sum(p * np.log(p) for p in probabilities if p > 0)


def energy(logits):
    """-log Σ_k exp(z_k) for one sample, logits (K,)."""
    largest = max(logits)
    return -(largest + np.log(sum(np.exp(z - largest) for z in logits)))


def mutual_information(member_logits):
    total = 0.0
    for row in member_logits:
        probabilities = [softmax(logits) for logits in row]
        total += entropy(np.mean(probabilities, axis=0))
        total -= np.mean([entropy(p) for p in probabilities])
    return total / len(member_logits)


def failure_auroc(confidence, correct):
    """Compare every correct prediction with every incorrect one; a tie counts half."""
    wins = [
        float(correct_one > wrong_one) + 0.5 * float(correct_one == wrong_one)
        for correct_one in confidence[correct]
        for wrong_one in confidence[~correct]
    ]
    return np.mean(wins)


def risk(confidence, correct):
    """Expected error rate of the i most confident samples, i = 1 … N, with ties in random order."""
    risks = []
    for i in range(1, len(confidence) + 1):
        border = sorted(confidence, reverse=True)[i - 1]
        higher, tied = confidence > border, confidence == border
        errors = np.sum(~correct[higher]) + (i - higher.sum()) * np.mean(~correct[tied])
        risks.append(errors / i)
    return np.array(risks)


def aurc(confidence, correct):
    return risk(confidence, correct).mean()


def risk_at(confidence, correct, percent):
    """Risk at the smallest coverage of at least `percent` percent."""
    accepted = -(-percent * len(confidence) // 100)
    return risk(confidence, correct)[accepted - 1]


def resampled_intervals(logits, labels, counts, level=0.95):
    """Metrics of each resample and their percentiles."""
    metrics = {"accuracy": [], "nll": [], "ece": []}
    for row in counts:
        chosen = np.repeat(np.arange(len(labels)), row)
        z, y = logits[chosen], labels[chosen]
        confidence, correct = top(z, y)
        metrics["accuracy"].append(correct.mean())
        metrics["nll"].append(nll(z, y))
        metrics["ece"].append(ece(confidence, correct))
    ends = [(1 - level) / 2, (1 + level) / 2]
    return {name: (values, np.quantile(values, ends)) for name, values in metrics.items()}


def average_precision(scores, positive):
    """Σ over thresholds, highest first, of (gain in recall) x precision; ties enter together."""
    total, recall = 0.0, 0.0
    for limit in sorted(set(scores), reverse=True):
        accepted = scores >= limit
        new_recall = positive[accepted].sum() / positive.sum()
        total += (new_recall - recall) * positive[accepted].mean()
        recall = new_recall
    return total


def label_distribution(logits, distributions):
    """Terms of each sample, by loops over classes; 0 · log 0 = 0."""
    terms = {"cross_entropy": [], "kl_divergence": [], "brier": [], "total_variation": []}
    terms |= {"vote_agreement": [], "label_entropy": []}
    for z, q in zip(logits, distributions, strict=True):
        p = softmax(z)
        voted = [k for k in range(len(q)) if q[k] > 0]
        terms["cross_entropy"].append(-sum(q[k] * np.log(p[k]) for k in voted))
        terms["kl_divergence"].append(sum(q[k] * np.log(q[k] / p[k]) for k in voted))
        terms["brier"].append(sum((p[k] - q[k]) ** 2 for k in range(len(q))))
        # max over sets of classes A of |p(A) - q(A)|
        terms["total_variation"].append(sum(p[k] - q[k] for k in range(len(q)) if p[k] > q[k]))
        terms["vote_agreement"].append(q[int(np.argmax(z))])
        terms["label_entropy"].append(entropy(q))
    return {name: np.array(values) for name, values in terms.items()}
