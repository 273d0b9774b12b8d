# ruff: noqa: E501
"""Common mistakes in solutions of the exercises get the right diagnosis, and solutions written differently pass.

Each wrong program is a solution in which one piece of text is replaced.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from MyGPT.exercises import TASKS
from MyGPT.exercises.checking import Result, check_file
from places import ROOT

SOLUTIONS = ROOT / "exercises" / "solutions"

LEARN_JOIN = "        ids = join(ids, best, 256 + len(merges))\n"
TEXT_ORDER = """    i = 0
    ids = list(ids)
    while i < len(ids) - 1:
        if (ids[i], ids[i + 1]) in merges:
            ids[i : i + 2] = [256 + merges.index((ids[i], ids[i + 1]))]
            i = max(i - 1, 0)
        else:
            i += 1
    return ids
    ids = list(ids)
"""
COUNTED_APART = """        counts, last = Counter(), None
        for pair in pairwise(ids):
            last = None if pair == last else pair
            counts.update([pair] * (last is not None))
"""
BPE = [
    ("        counts = Counter(pairwise(ids))\n", COUNTED_APART, "overlapping pairs are counted once"),
    ("-counts[pair], pair)", "-counts[pair], 0)", "occurs first in the text, not the smallest"),
    ("-counts[pair], pair)", "-counts[pair], -pair[0], -pair[1])", "the largest, not the smallest"),
    ("-counts[pair], pair)", "counts[pair], pair)", "least frequent"),
    (LEARN_JOIN, "", "the same pair is found again"),
    (
        "    while len(merges) < n_merges:",
        "    counts = Counter(pairwise(ids))\n    return sorted(counts, key=lambda pair: (-counts[pair], pair))[:n_merges]\n    while True:",
        "counted only once",
    ),
    ("best, 256 + len(merges))\n", "best, 257 + len(merges))\n", "first new id is 257"),
    ("best, 256 + len(merges))\n", "best, 255 + len(merges))\n", "first new id is 255"),
    ("        if not counts:", "        if not counts or max(counts.values()) == 1:", "the best pair occurs only once"),
    ("            i += 2\n", "            i += 1 if ids[i + 1 : i + 3] == list(pair) else 2\n", "joined twice"),
    ("    while len(merges) < n_merges:", "    while len(merges) < n_merges - 1:", "one merge too early"),
    ("    ids = list(ids)\n", TEXT_ORDER, "order of the text; apply merge 256 to the whole text"),
    ("enumerate(merges, start=256)", "reversed(list(enumerate(merges, start=256)))", "in the reverse order"),
    ("enumerate(merges, start=256)", "enumerate(merges, start=257)", "new ids start at 257"),
    ("enumerate(merges, start=256)", "enumerate(merges[:1], start=256)", "only the first merge"),
    ("    ids = list(ids)\n", "    return list(ids)\n", "without any merge"),
    (
        "        ids = join(ids, pair, new_id)\n",
        "        i = next((i for i in range(len(ids)) if tuple(ids[i : i + 2]) == pair), None)\n"
        "        if i is not None:\n            ids[i : i + 2] = [new_id]\n",
        "only the first occurrence",
    ),
    (
        "        ids = join(ids, pair, new_id)\n",
        "        ids = join(ids[::-1], pair[::-1], new_id)[::-1]\n",
        "from right to left",
    ),
    (
        "    return ids\n",
        "    return ids[:-1]\n",
        "the last id is lost",
    ),
    ("    ids = list(ids)\n", "    ids.append(0)\n    ids.pop(0)\n", "argument number 1 is changed in place"),
]  # fmt: skip
WINDOWS = [
    ("ids[start + 1 : start + length + 1]", "ids[start : start + length]", "the targets are not shifted"),
    ("ids[start + 1 : start + length + 1]", "ids.roll(1)[start : start + length]", "shifted backwards"),
    ("ids[start + 1 : start + length + 1]", "ids.roll(-2)[start : start + length]", "shifted by two"),
    ("ids[start + 1 : start + length + 1]", "ids[start + length : start + length + 1]", "only one target per window"),
    ("ids[start + 1 : start + length + 1]", "ids[start : start + length + 1]", "one id longer"),
    ("last_start + 1, stride)", "last_start, stride)", "the last window is missing"),
    ("last_start + 1, stride)", "last_start + 1)", "windows start at every position"),
    ("last_start + 1, stride)", "last_start + 1, length)", "multiples of the length"),
    ("return inputs, targets", "return targets, inputs", "inputs and targets are exchanged"),
    ("        raise ValueError(", "        print(", "ValueError is expected"),
]
SCORES = "    scores = q @ k.transpose(-2, -1) / math.sqrt(D)"
WEIGHTS = "    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)"
CAUSAL = "torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)"
ATTENTION = [
    (WEIGHTS, "    weights = scores.softmax(dim=-1)", "there is no causal mask"),
    ("tril(S - T)", "tril(S - T - 1)", "a token must see itself"),
    ("tril(S - T)", "tril(S - T + 1)", "also sees the next token"),
    ("tril(S - T)", "tril()", "aligned to the first key"),
    (" / math.sqrt(D)", "", "not divided by √D"),
    ("math.sqrt(D)", "D", "divided by D, but √D"),
    (" / math.sqrt(D)", " * math.sqrt(D)", "multiplied by √D"),
    ("math.sqrt(D)", "math.sqrt(D * q.shape[1])", "√(H · D)"),
    ("math.sqrt(D)", "math.sqrt(S)", "√S"),
    ("softmax(dim=-1)", "softmax(dim=-2)", "over the queries"),
    ("softmax(dim=-1)", "softmax(dim=1)", "over the heads"),
    ("softmax(dim=-1)", "softmax(dim=0)", "over the batch"),
    (WEIGHTS, "    weights = scores.softmax(dim=-1).masked_fill(~mask, 0)", "applied after the softmax"),
    ("-math.inf", "0", "hidden scores are set to 0"),
    ("~mask", "mask", "the wrong way round"),
    (WEIGHTS, "    weights = scores.masked_fill(~mask, 0)", "the softmax is missing"),
    ("weights @ v", "weights", "the attention weights are returned"),
    ("weights @ v", "weights @ k", "the keys are used in place of the values"),
    ("weights @ v", "(weights @ v).transpose(1, 2)", "dimensions of heads and tokens are exchanged"),
    ("weights @ v", "(weights @ v).transpose(1, 2).reshape(q.shape[0], T, -1)", "side by side"),
    ("q @ k.transpose(-2, -1)", "(q @ k.transpose(-2, -1) if T != S else k @ q.transpose(-2, -1))", "q and k are exchanged"),
    ("    if mask is None:", "    if True:", "ignored, and the causal mask is used"),
    (WEIGHTS, WEIGHTS.replace("~mask", f"~(mask & {CAUSAL})"), "in addition to the argument mask"),
    (WEIGHTS, "    weights = (scores + mask).softmax(dim=-1) if mask.dim() == 4 else scores.masked_fill(~mask, -math.inf).softmax(-1)", "added to the scores"),
    (SCORES, "    scores = q.div_(math.sqrt(D)) @ k.transpose(-2, -1)", "argument number 1 is changed in place"),
    ("weights @ v", "(weights @ v).detach()", "does not require grad"),
    ("weights @ v", "1.01 * weights @ v", "no common mistake gives these numbers; work the example"),
]  # fmt: skip
BLOCK = [
    ("x = x + self.attention", "x = self.attention", "the first residual connection is missing"),
    ("return x + self.mlp", "return self.mlp", "the second residual connection is missing"),
    ("x = x + self.attention(self.ln_1(x))", "x = self.ln_1(x + self.attention(x))\n        return self.ln_2(x + self.mlp(x))", "post-LN"),
    ("x = x + self.attention(self.ln_1(x))", "x = self.ln_1(x)\n        x = self.ln_2(x + self.attention(x))\n        return x + self.mlp(x)", "normalised stream"),
    ("self.mlp(self.ln_2(x))", "self.mlp(self.ln_1(x))", "ln_1 is used twice"),
    ("self.attention(self.ln_1(x))", "self.attention(self.ln_2(x))", "ln_2 is used twice"),
    ("self.mlp(self.ln_2(x))", "self.mlp(x)", "ln_2 is missing"),
    ("self.attention(self.ln_1(x))", "self.attention(x)", "ln_1 is missing"),
    ("x = x + self.attention(self.ln_1(x))", "return x + self.attention(self.ln_1(x)) + self.mlp(self.ln_2(x))", "before attention was added"),
    (', approximate="tanh"', "", "the exact GELU is used"),
    ('F.gelu(self.c_fc(x), approximate="tanh")', "F.relu(self.c_fc(x))", "ReLU is used"),
    ('F.gelu(self.c_fc(x), approximate="tanh")', "F.silu(self.c_fc(x))", "SiLU is used"),
    ('F.gelu(self.c_fc(x), approximate="tanh")', "self.c_fc(x)", "no activation function"),
    (", is_causal=True", "", "not causal"),
    ("view(B, T, self.n_heads, -1).transpose(1, 2)", "reshape(B, self.n_heads, T, -1)", "split in the wrong order: use view(B, T, H, D)"),
    ("view(B, T, self.n_heads, -1).transpose(1, 2)", "view(B, T, -1, self.n_heads).permute(0, 3, 1, 2)", "split in the wrong order"),
    ("y.transpose(1, 2).reshape", "y.reshape", "put together in the wrong order"),
    ("q, k, v = self.c_attn(x).chunk(3, dim=-1)", "k, q, v = self.c_attn(x).chunk(3, dim=-1)", "queries and keys are exchanged"),
    ("q, k, v = self.c_attn(x).chunk(3, dim=-1)", "v, k, q = self.c_attn(x).chunk(3, dim=-1)", "read as v, k, q"),
    ("self.attn_proj(y.transpose(1, 2).reshape(B, T, C))", "y.transpose(1, 2).reshape(B, T, C)", "attn_proj is missing"),
    ("self.n_heads, -1)", "1, -1)", "not split into heads"),
    ("self.ln_2 = nn.LayerNorm(emb_dim)", "self.norm = nn.LayerNorm(emb_dim)", "keep the original layers"),
]  # fmt: skip
LOGSUMEXP = "logits - logits.logsumexp(dim=-1, keepdim=True)"
LOSS = [
    ("return -of_targets.mean()", "return -of_targets.mean() / 0.6931471805599453", "base 2"),
    ("-of_targets.mean()", "of_targets.mean()", "the sign is missing"),
    ("-of_targets.mean()", "-of_targets.sum()", "are summed"),
    ("-of_targets.mean()", "-of_targets.sum() / len(ids)", "divided by B, but the mean"),
    ("-of_targets.mean()", "-of_targets.sum() / ids.numel()", "divided by B * T"),
    (
        "-of_targets.mean()",
        "-of_targets.squeeze(-1).mean(0)",
        "mean is taken over the wrong dimension: one loss per token",
    ),
    (
        "-of_targets.mean()",
        "-of_targets.squeeze(-1).mean(1)",
        "mean is taken over the wrong dimension: one loss per sequence",
    ),
    ("-of_targets.mean()", "-of_targets.squeeze(-1)", "the mean is missing"),
    ("-of_targets.mean()", "-of_targets[:, -1].mean()", "only the last position"),
    ("logits[:, :-1], ids[:, 1:]", "logits, ids", "not shifted"),
    ("logits[:, :-1], ids[:, 1:]", "logits[:, :-1], ids[:, :-1]", "not shifted"),
    ("logits[:, :-1], ids[:, 1:]", "logits[:, 1:], ids[:, :-1]", "the shift is backwards"),
    ("logits[:, :-1], ids[:, 1:]", "logits, ids.roll(-1, 1)", "roll makes the first id"),
    ("logsumexp(dim=-1", "logsumexp(dim=1", "over the tokens (dim=1)"),
    ("logsumexp(dim=-1", "logsumexp(dim=0", "over the batch (dim=0)"),
    (LOGSUMEXP, "logits", "the softmax is missing"),
    (LOGSUMEXP, "logits.softmax(-1)", "the logarithm is missing"),
    (LOGSUMEXP, "logits.softmax(-1).log_softmax(-1)", "softmax is applied twice"),
    ("return -of_targets.mean()", "return -of_targets.exp().mean().log()", "logarithm of the mean probability"),
    (LOGSUMEXP, "(logits.exp() / logits.exp().sum(-1, keepdim=True)).log()", "exp of a large logit is infinite"),
    ("return -of_targets.mean()", "return (-of_targets.mean()).detach()", "the loss has no gradient"),
    ("return -of_targets.mean()", "return (-of_targets.mean()).item()", "of the type float"),
    ("return loss.exp()", "return 2**loss", "2 ** loss"),
    ("return loss.exp()", "return (-loss).exp()", "exp(-loss)"),
]
KEPT = "sum_before < top_p"
RETURNED = "    return logits.softmax(-1)\n"
SCATTER = "        is_kept = torch.zeros_like(is_kept).scatter(-1, order, is_kept)  # in the order of the vocabulary\n"
SAMPLING = [
    ("logits / temperature", "logits * temperature", "multiplied by the temperature"),
    ("    logits = logits / temperature\n", "", "the temperature is ignored"),
    ("    logits = logits / temperature\n", "    if temperature != 1:\n        return logits.softmax(-1) / temperature\n", "after the softmax"),
    (RETURNED, "    return logits.softmax(0)\n", "over the sequences (dim=0)"),
    (RETURNED, "    return logits\n", "the softmax is missing"),
    ("logits < threshold", "logits <= threshold", "the k-th token is dropped"),
    ("min(top_k, V)", "min(top_k + 1, V)", "k + 1 tokens are kept"),
    ("logits < threshold", "logits < threshold[0]", "the first sequence is used for all"),
    ("logits < threshold", "logits >= threshold", "are removed"),
    ("logits < threshold, -math.inf", "logits < threshold, 0", "set to 0, but they must be minus infinity"),
    ("        logits = logits.masked_fill(logits < threshold, -math.inf)\n", "        return logits.softmax(-1) * (logits >= threshold)\n", "not divided by their sum"),
    ("topk(min(top_k, V))", "topk(top_k)", "raises RuntimeError"),
    (KEPT, "probabilities.cumsum(-1) <= top_p", "the token that crosses p is dropped"),
    (KEPT, "sum_before - probabilities.roll(1, -1) * (sum_before > 0) < top_p", "one token too many"),
    (SCATTER, "", "not brought back to the order"),
    ("descending=True", "descending=False", "sort in descending order"),
    ("        is_kept = torch.zeros_like(is_kept).scatter(-1, order, is_kept)", "        is_kept = is_kept.gather(-1, order)", "use scatter"),
    ("~is_kept, -math.inf", "~is_kept, 0", "must be minus infinity"),
    (KEPT, "probabilities >= top_p", "sum of the probabilities decides"),
    ("        probabilities, order = logits.softmax(-1)", "        probabilities, order = (raw / temperature).softmax(-1)", "reads the probabilities before top-k"),
    ("    if temperature == 0:", "    if temperature == -1:", "divided by the temperature 0"),
]  # fmt: skip
KV_CACHE = [
    ("torch.arange(cache.length, cache.length + T)", "torch.arange(T)", "the positions are not advanced"),
    ("torch.arange(cache.length, cache.length + T)", "torch.arange(cache.length, cache.length + T) + 1", "one too large"),
    ("torch.arange(cache.length, cache.length + T)", "torch.full((T,), cache.length + T - 1)", "the same position"),
    ("torch.cat([self.keys, k], dim=2)", "k", "overwritten"),
    ("torch.cat([self.values, v], dim=2)", "v", "overwritten"),
    ("[self.keys, k]", "[k, self.keys]", "before the old ones"),
    ("torch.cat([self.keys, k], dim=2)", "torch.cat([self.keys, self.keys, k], dim=2)", "added twice"),
    ("torch.cat([self.keys, k], dim=2)", "self.keys", "the new tokens are missing"),
    ("return self.keys, self.values", "return self.values, self.keys", "keys and values are exchanged"),
    ("tril(S - T)", "tril(S)", "there is no mask"),
    ("tril(S - T)", "tril()", "aligned to the first key"),
    ("attn_mask=mask", "is_causal=True", "aligned to the first key"),
    ("tril(S - T)", "tril(S - T + 1)", "off by one: every new token also sees the next"),
    ("tril(S - T)", "tril(S - T - 1)", "a token must see itself"),
    ("    k, v = cache.append(k, v)", "    cache.append(k, v)", "use those that append returns"),
    (
        "    B, T = ids.shape\n",
        "    B, T = ids.shape\n    cache.ids = torch.cat([*getattr(cache, 'ids', ids[:, :0]).split(1, 1), ids], 1)\n"
        "    model(cache.ids)\n",
        "c_attn computed",
    ),
]  # fmt: skip
LORA = [
    ("torch.zeros(rank, linear.out_features)", "torch.randn(rank, linear.out_features)", "A and B are both random"),
    ("0.02 * torch.randn(linear.in_features, rank)", "torch.zeros(linear.in_features, rank)", "A and B are both zero"),
    ("0.02 * torch.randn(linear.in_features, rank)", "torch.ones(linear.in_features, rank)", "the numbers of A are equal"),
    ("torch.randn(linear.in_features, rank)", "torch.randn(rank, linear.in_features)", "the dimensions are exchanged"),
    ("linear.requires_grad_(False)", "linear", "freeze the linear layer"),
    ("nn.Parameter(torch.zeros(rank, linear.out_features))", "torch.zeros(rank, linear.out_features)", "nn.Parameter is expected"),
    ("self.scale * (x @", "(x @", "the factor alpha / rank is missing"),
    ("alpha / rank\n", "alpha\n", "the factor is alpha"),
    ("alpha / rank\n", "rank / alpha\n", "the factor is rank / alpha"),
    ("alpha / rank\n", "alpha / rank**0.5\n", "alpha / √rank"),
    ("self.linear(x) + ", "", "the output of the frozen layer is missing"),
    ("self.linear(x) + ", "self.linear(x) - ", "subtracted"),
    ("self.linear(x) + ", "self.linear(x) + self.linear.bias + ", "added twice"),
    ("return self.linear(x) + self.scale * (x @ self.A @ self.B)", "return self.scale * (self.linear(x) + x @ self.A @ self.B)", "to the frozen layer as well"),
    ("(x @ self.A @ self.B)", "(x @ (self.A @ self.B).T if x.shape[-1] == 6 else x @ self.A @ self.B)", "the correction is transposed"),
    ("(self.A @ self.B).T", "(self.A @ self.B)", "the correction is not transposed"),
    ("merged.weight += self.scale * ", "merged.weight += ", "the factor alpha / rank is missing"),
    ("copy.deepcopy(self.linear)", "self.linear", "the weight of the frozen layer is changed"),
]  # fmt: skip
INDUCTION = [
    (".roll(-1, 0)", "", "attends to the token itself"),
    ("SHARP = 1000.0", "SHARP = 1.0", "make the weights of its queries larger"),
    ("key[TOKEN, BEFORE]", "key[TOKEN, TOKEN]", "must read what layer 0 wrote"),
    ("    key[TOKEN, V] = -1", "    # key[TOKEN, V] = -1", "position 0 has no token before it"),
    ("value[TOKEN, TOKEN] = 3", "value[TOKEN, TOKEN] = 0", "the output is not the token found there"),
    ("    model = GPTModel(CONFIG)", "    return GPTModel({**vars(CONFIG), 'n_layers': 3})", "two layers are expected"),
    ("    for parameter in model.parameters():\n        parameter.zero_()\n", "    model.transformer.wte.weight.fill_(float('nan'))\n", "nan or inf"),
    ("    return model", "    return body", "a GPTModel is expected"),
]  # fmt: skip
TABLE = {
    "bpe": BPE, "windows": WINDOWS, "attention": ATTENTION, "block": BLOCK, "loss": LOSS, "sampling": SAMPLING,
    "kv_cache": KV_CACHE, "lora": LORA, "induction_head": INDUCTION,
}  # fmt: skip
CASES = [(task, *case) for task, cases in TABLE.items() for case in cases]


def checked(task: str, source: str, directory: Path) -> Result:
    """Return the result of a file with this source."""
    path = directory / f"{task}.py"
    path.write_text(source, encoding="utf-8")
    return check_file(path, task)


@pytest.mark.parametrize(
    ("task", "old", "new", "cause"), CASES, ids=[f"{task}-{cause[:40]}" for task, *_, cause in CASES]
)
def test_a_common_mistake_is_named(task: str, old: str, new: str, cause: str, tmp_path: Path) -> None:
    source = (SOLUTIONS / f"{task}.py").read_text(encoding="utf-8")
    assert old in source
    source = source.replace(old, new)
    if "raw" in new:
        source = source.replace("    V = logits.shape[-1]\n", "    V = logits.shape[-1]\n    raw = logits\n")
    result = checked(task, source, tmp_path)
    assert result.status == "wrong"
    assert cause in result.sentence
    assert "\n" not in result.sentence and "the check failed" not in result.sentence


@pytest.mark.parametrize("task", TASKS)
def test_the_solution_passes_and_the_original_is_not_started(task: str) -> None:
    solved = check_file(SOLUTIONS / f"{task}.py", task)
    assert (solved.status, solved.sentence) == ("solved", "")
    assert len(solved.passed) >= 3
    assert check_file(ROOT / "exercises" / f"{task}.py", task).status == "not started"
