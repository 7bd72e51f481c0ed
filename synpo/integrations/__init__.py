"""SynPO's kernels in other people's training loops: PairLoss for a loop of your own, and swaps for trl's trainers.

The swaps are modules of their own, so that trl is imported where it is used alone: ``synpo.integrations.trl_dpo``
(FusedDPOTrainer, FusedDPOConfig) and ``synpo.integrations.trl_cpo`` (FusedCPOTrainer, FusedCPOConfig).
"""

from .pair_loss import AnswerScorer, PairLoss, pair_batch

__all__ = ["AnswerScorer", "PairLoss", "pair_batch"]
