"""Captions scored by a language model, by a function, or from recorded answers: never by a guess."""

from .answers import Unparsable, parse_scores
from .cache import Answer, AnswerCache
from .client import ChatClient, NoAnswer, Request, ServerError
from .criteria import CONSISTENCY, CRITERIA, FACTUALITY, FLUENCY, LAYOUTS, Criterion, Question, ask
from .judges import Judge, ModelJudge, OracleJudge, Verdict
from .keys import Key, read_key
from .scores import Judgement, Scores, Weights, judge_candidates
from .spending import BudgetReached, Spending, Usage

__all__ = [
    "CONSISTENCY",
    "CRITERIA",
    "FACTUALITY",
    "FLUENCY",
    "LAYOUTS",
    "Answer",
    "AnswerCache",
    "BudgetReached",
    "ChatClient",
    "Criterion",
    "Judge",
    "Judgement",
    "Key",
    "ModelJudge",
    "NoAnswer",
    "OracleJudge",
    "Question",
    "Request",
    "Scores",
    "ServerError",
    "Spending",
    "Unparsable",
    "Usage",
    "Verdict",
    "Weights",
    "ask",
    "judge_candidates",
    "parse_scores",
    "read_key",
]
