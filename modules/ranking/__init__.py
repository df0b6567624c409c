"""Where the right answer stands among all candidates: filtered ranks, and the metric that adds them up."""

from modules.ranking.filtered_ranking import RANK_BINS, FilteredRanking
from modules.ranking.ranks import TIES, blocked_ranks, check_known, ranks_by_counting

__all__ = ["RANK_BINS", "TIES", "FilteredRanking", "blocked_ranks", "check_known", "ranks_by_counting"]
