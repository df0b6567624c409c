"""Speed of knowledge-graph embeddings beside the direct way to write them, at the size of FB15k-237.

    python -m benchmarks.ankge --root FB15K237 [--parts loading steps evaluation retriever] [--rounds 5]

FB15K237 holds train.txt, valid.txt and test.txt, or the same as .gz. One thread, processor time, medians.

* ``steps``: a training step (forward, backward, fused Adam) of B = 1024 triples and K = 256 negatives, d = 500: each
  triple with negatives of its own, gathered, subtracted and summed by autograd, and the same loss here, with negatives
  shared by the batch.
* ``evaluation``: filtered ranks of TransE, d = 500: one query after the other, and in batches; and the whole test set.
* ``loading``: reading the files and building what training and evaluation look up.
* ``retriever``: analogical objects of a share of the training triples, from which the whole is estimated.
* ``pruning`` (with --base, a checkpoint of TransE on this graph): how many candidate pairs the triangle inequality
  could leave out, if the distance of the last pair that is kept were known before.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from benchmarks.timing import interleaved, report
from datamodules import KnowledgeGraph
from datamodules.sampling import BatchKey
from modules.ankge import RetrievalSettings, retrieve
from modules.knowledge_graph import EmbeddingTables, KnowledgeGraphEmbedding, RotatE, ScoringFunction, TransE
from modules.ranking import ranks_by_counting

BATCH, NEGATIVES, DIMENSION, MARGIN = 1024, 256, 500, 9.0
QUERIES, ROUNDED_AWAY = 64, 3


def direct_transe(head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
    """Distances of TransE, as the equation reads."""
    return torch.norm(head + relation - tail, p=1, dim=-1)


def direct_rotate(head: Tensor, relation: Tensor, tail: Tensor) -> Tensor:
    """Distances of RotatE, as the equation reads, with phases already in radians."""
    head_real, head_imaginary = head.chunk(2, dim=-1)
    tail_real, tail_imaginary = tail.chunk(2, dim=-1)
    real = head_real * relation.cos() - head_imaginary * relation.sin() - tail_real
    imaginary = head_real * relation.sin() + head_imaginary * relation.cos() - tail_imaginary
    return torch.stack([real, imaginary]).norm(dim=0).sum(-1)


def direct_loss(
    tables: EmbeddingTables, distance: Callable[..., Tensor], turn: float, batch: tuple[Tensor, ...]
) -> Tensor:
    """Self-adversarial loss with negatives (B, K) of each triple."""
    heads, relations, tails, negatives = batch
    head = tables.entities[heads].unsqueeze(1)
    relation = (tables.relations[relations] * turn).unsqueeze(1)
    positive = MARGIN - distance(head, relation, tables.entities[tails].unsqueeze(1)).squeeze(1)
    negative = MARGIN - distance(head, relation, tables.entities[negatives])
    share = torch.softmax(negative, dim=1).detach()
    return (-logsigmoid(positive).mean() - (share * logsigmoid(-negative)).sum(1).mean()) / 2


def time_step(
    data: KnowledgeGraph, scoring: type[ScoringFunction], distance: Callable[..., Tensor], rounds: int
) -> None:
    """One training step, both ways, on the same tables."""
    module = KnowledgeGraphEmbedding(scoring(DIMENSION, MARGIN), data.num_entities, data.num_relations)
    module.log = lambda *_, **__: None
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-4, fused=True)
    dataset = data.train_dataset()
    batch = dataset.__getitems__(BatchKey(0, 0, 0, torch.randperm(len(dataset))[:BATCH].numpy()))
    own = torch.randint(data.num_entities, (BATCH, NEGATIVES))
    turn = torch.pi / module.tables.scoring.initial_range if scoring is RotatE else 1.0

    def step(loss: Callable[[], Tensor]) -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    direct = (batch.heads, batch.relations, batch.tails, own)
    alternatives = {
        "direct": lambda: step(lambda: direct_loss(module.tables, distance, turn, direct)),
        "here": lambda: step(lambda: module.training_step(batch, 0)),
    }
    seconds = interleaved(alternatives, rounds, warm_up=1, clock=time.process_time)
    print(report(f"{scoring.__name__}, a training step", seconds, "direct"))


def time_batches(data: KnowledgeGraph, rounds: int) -> None:
    """Making a training batch: triples, negatives, and which of them are true."""
    dataset = data.train_dataset()
    order = torch.randperm(len(dataset)).numpy()
    keys = iter(BatchKey(0, 0, number, order[number * BATCH :][:BATCH]) for number in range(100 + 10 * rounds))
    seconds = interleaved({"here": lambda: dataset.__getitems__(next(keys))}, 10 * rounds, clock=time.process_time)
    print(report("a training batch", seconds, "here"))


def time_evaluation(data: KnowledgeGraph, rounds: int) -> None:
    """Filtered ranks of some queries both ways, then of the whole test set."""
    module = KnowledgeGraphEmbedding(TransE(DIMENSION, MARGIN), data.num_entities, data.num_relations).eval()
    queries = data.queries("test")
    batches = [
        queries.__getitems__(BatchKey(0, 0, 0, torch.arange(start, start + 256).numpy()))
        for start in range(0, 4 * 256, 256)
    ]
    entities, relations = module.tables.entities.detach(), module.tables.relations.detach()

    def one_by_one() -> Tensor:
        ranks, batch = [], batches[0]
        for row in range(QUERIES):
            scores = -direct_transe(entities[batch.heads[row]], relations[batch.relations[row]], entities)
            target = scores[batch.tails[row]].clone()
            scores[batch.known[1][batch.known[0] == row]] = -torch.inf
            ranks.append(1 + (scores > target).sum())
        return torch.stack(ranks)

    def in_batches() -> Tensor:
        batch = batches[0]
        scores = module.candidate_scores(batch)
        return ranks_by_counting(scores, batch.tails, batch.known)

    found = in_batches()[:QUERIES]
    # Candidates of random vectors lie close together: the order in which numbers are added moves a rank by one or two.
    assert (found - one_by_one()).abs().max() <= ROUNDED_AWAY, "the two ways disagree"
    seconds = interleaved({"one by one": one_by_one, "here": in_batches}, rounds, warm_up=1, clock=time.process_time)
    each = {"one by one": [s / QUERIES for s in seconds["one by one"]], "here": [s / 256 for s in seconds["here"]]}
    print(report("TransE, a filtered query", each, "one by one"))
    begin = time.process_time()
    for batch in data.test_dataloader():
        module.rankings(batch)
    print(f"all {len(queries)} test queries and the control: {time.process_time() - begin:.0f} CPU seconds\n")


def time_loading(root: str) -> KnowledgeGraph:
    """From the files to the first batches."""
    begin = time.process_time()
    data = KnowledgeGraph(layout="tsv", root=root, batch_size=BATCH, num_negatives=NEGATIVES)
    data.setup("fit")
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    print(
        f"loading, with the first batches of training and validation: {time.process_time() - begin:.2f} CPU seconds\n"
    )
    return data


def time_retriever(data: KnowledgeGraph, dimension: int, candidates: list[int], share: int) -> None:
    """Analogical objects of every ``share``-th (relation, tail), and what all of them would take."""
    tables = EmbeddingTables(TransE(dimension, MARGIN), data.num_entities, data.num_relations)
    triples = torch.from_numpy(np.asarray(data.train_triples))
    groups = torch.unique(triples[:, 1:], dim=0, return_inverse=True)[1]
    chosen = triples[groups % share == 0]
    for count in candidates:
        settings = RetrievalSettings(1, 1, 3, count, 40).clipped(data.num_entities, 2 * data.num_relations)
        begin = time.process_time()
        retrieve(tables, chosen, settings)
        seconds = time.process_time() - begin
        print(
            f"retriever, d = {dimension}, m = {count}, n = 40: {len(chosen)} of {len(triples)} triples in "
            f"{seconds:.0f} CPU seconds, all in about {seconds * len(triples) / len(chosen) / 60:.0f} CPU minutes"
        )


@torch.no_grad()
def count_pruned(data: KnowledgeGraph, base: str, candidates: list[int], triples: int = 60) -> None:
    """Share of pairs (h', r') that are none of the best by |d(h', r, t) - |r' - r|| or |d(h, r', t) - |h' - h||."""
    state = torch.load(base, map_location="cpu", weights_only=True)["state_dict"]
    entities, relations = state["tables.entities"], state["tables.relations"]
    train = torch.from_numpy(np.asarray(data.train_triples))
    chosen = train[torch.randint(len(train), (triples,), generator=torch.Generator().manual_seed(0))]
    for count in candidates:
        shares = []
        for head, relation, tail in chosen.tolist():
            by_head = (entities + relations[relation] - entities[tail]).abs().sum(1)
            by_head[tail] = torch.inf
            heads = by_head.topk(count, largest=False)
            kinds = (entities[head] + relations - entities[tail]).abs().sum(1).topk(40, largest=False)
            ends = entities[tail] - entities[heads.indices]
            pairs = torch.cdist(relations[kinds.indices], ends, p=1)
            others = (relations[kinds.indices] - relations[relation]).abs().sum(1)
            first = (heads.values[None] - others[:, None]).abs()
            others = (entities[heads.indices] - entities[head]).abs().sum(1)
            second = (kinds.values[:, None] - others[None]).abs()
            last = pairs.flatten().topk(3, largest=False).values[-1]
            shares.append((torch.maximum(first, second) > last).float().mean().item())
        print(f"pruning, m = {count}, n = 40: at most {100 * np.mean(shares):.1f} % of the pairs of {triples} triples")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True)
    parts = ["loading", "steps", "evaluation", "retriever"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=[*parts, "pruning"])
    parser.add_argument("--base", help="checkpoint of TransE, for pruning")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dimension", type=int, default=DIMENSION, help="of the retriever")
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 1000], help="m of the retriever")
    parser.add_argument("--share", type=int, default=200, help="one of how many (relation, tail) pairs is looked up")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = time_loading(options.root)
    if "steps" in options.parts:
        time_batches(data, options.rounds)
        time_step(data, TransE, direct_transe, options.rounds)
        time_step(data, RotatE, direct_rotate, options.rounds)
    if "evaluation" in options.parts:
        time_evaluation(data, options.rounds)
    if "retriever" in options.parts:
        time_retriever(data, options.dimension, options.candidates, options.share)
    if "pruning" in options.parts:
        if options.base is None:
            parser.error("--parts pruning needs --base, the checkpoint of a TransE")
        count_pruned(data, options.base, options.candidates)


if __name__ == "__main__":
    main()
