"""The typed batches that the datamodules yield."""

from typing import NamedTuple

from torch import Tensor


class ImageBatch(NamedTuple):
    """Images with labels and the rows they come from.

    Args:
        views: One tensor per view, each (B, C, H, W) float32, normalised. One view in evaluation and classification.
        labels: (B,) int64 class indices, -1 where the label is unknown or not to be used.
        index: (B,) int64 row of each sample in its split.
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    index: Tensor

    @property
    def images(self) -> Tensor:
        """The first view, (B, C, H, W)."""
        return self.views[0]


class SegmentationBatch(NamedTuple):
    """Images with a class for each pixel.

    Args:
        images: (B, C, h, w) float32, normalised.
        masks: (B, H, W) int64 class indices, 255 where a pixel is not to be learned from or counted. In training the
            size is that of the images; in evaluation it is that of the picture on disk, also where nothing is labelled.
            Images and masks of an evaluation batch whose pictures differ in size are lists of B tensors instead.
        index: (B,) int64 row of each sample in its split.
    """

    images: Tensor | list[Tensor]
    masks: Tensor | list[Tensor]
    index: Tensor


class DetectionBatch(NamedTuple):
    """Pictures with boxes around objects.

    Args:
        images: B tensors (C, h, w) float32 in [0, 1], of any sizes.
        targets: B dictionaries: ``boxes`` (n, 4) float32 xyxy in pixels of the image given to the model, ``labels``
            (n,) int64 from 1 (0 is the background), ``iscrowd`` (n,) int64, ``area`` (n,) float32 in pixels of the
            picture on disk (of the segment, where there is one), ``size`` (2,) int64 its height and width.
        index: (B,) int64 row of each sample in its split.
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    index: Tensor


class TripleBatch(NamedTuple):
    """Training triples of a knowledge graph, and entities that they are told apart from.

    Relations are 0..2R-1: the reverse of r is r + R, and row T / 2 + i of the T training triples is row i reversed.

    Args:
        heads: (B,) int64 entities.
        relations: (B,) int64 relations.
        tails: (B,) int64 entities.
        negatives: Entities, int64: (K,) shared by the batch, (C, K) where row i of the batch has those of chunk
            ``i // ceil(B / C)``, (B, K) for each triple its own, or (0,) for a training without negatives.
        excluded: (B, K) bool, true where the negative is a known tail of (head, relation) in training; (0,) like
            ``negatives`` without them.
        weights: (B,) float32 weights of the triples.
        index: (B,) int64 row of each among the T training triples.
    """

    heads: Tensor
    relations: Tensor
    tails: Tensor
    negatives: Tensor
    excluded: Tensor
    weights: Tensor
    index: Tensor


class LinkQueryBatch(NamedTuple):
    """Queries (head, relation, ?) to a knowledge graph, and what is known of their answers.

    A question for the head, (?, r, t), is the query (t, r + R, ?). All counts are over training triples with their
    reverses. The pairs are lists of coordinates of a (B, E) table, which itself is never made.

    Args:
        heads: (B,) int64 entities.
        relations: (B,) int64 relations, 0..2R-1.
        tails: (B,) int64 right answers, -1 where unknown.
        index: (B,) int64 row of each query: of n triples, 0..n-1 ask for the tail and n..2n-1 for the head.
        category: (B,) int64 kind of the relation, not reversed: 0 is 1-1, 1 is 1-N, 2 is N-1, 3 is N-N.
        known: (2, N) int64 (row in the batch, entity): right answers in any part of the data, without ``tails``.
        linked: (2, L) int64 (row in the batch, entity) that some relation links the head to; None, as the next
            three, where the data does not count.
        linked_counts: (L,) int64 number of such relations.
        seen: (2, S) int64 (row in the batch, entity) that is a tail of the relation, whatever the head.
        seen_counts: (S,) int64 number of such heads.
        entity_counts: (E,) int64 number of triples that an entity is the tail of.
    """

    heads: Tensor
    relations: Tensor
    tails: Tensor
    index: Tensor
    category: Tensor
    known: Tensor
    linked: Tensor | None
    linked_counts: Tensor | None
    seen: Tensor | None
    seen_counts: Tensor | None
    entity_counts: Tensor
