"""Never slower than off: plain steps between those with bets keep the estimate of plain decoding honest, and bets that
have not paid by what was measured are paused, whatever the model of costs and acceptance expects of them.
"""

from __future__ import annotations

import logging
import math

logger = logging.getLogger(__name__)

APART = 16  # plans between two control steps, at least
STEPS = 64  # with bets, after which their gain is judged, and after which an old one counts a third
ENOUGH, PLAIN = 4, 50  # plain steps before anything is judged, and after which an old one counts a third
ODD = 0.3  # of a logarithm: what is further off counts as much
WORST = -2.0  # a step can cost by its bets, as a share; what takes longer than that has other reasons
SURE = 2.0  # standard errors that a loss must be clear by
SHORTEST, LONGEST = 128, 4096  # plans that a pause takes


class Control:
    """Puts a share of the time by for plain steps, and compares what steps with bets saved.

    Args:
        share: Of the time of all steps that may be lost by control steps.

    Attributes:
        gain: Seconds that bets have saved lately, as a share of what the same tokens would have taken without them.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._credit = 0.0  # seconds
        self._since = 0  # plans since the last plain step
        self._plain, self._log = 0, 0.0  # plain steps, and the logarithm of their measured over predicted seconds
        self._pause, self._left = SHORTEST, 0
        self.gain = 0.0
        self._square = 0.0
        self._steps = 0  # with bets, since the last pause

    @property
    def paused(self) -> bool:
        """Whether no bet may be made but for probes."""
        return self._left > 0

    def due(self, seconds_off: float, advantage: float) -> bool:
        """Whether the next step should be plain though a bet looks better by so many seconds; called for every plan."""
        self._since += 1
        self._left = max(0, self._left - 1)
        self._credit = min(self._credit + self._share * seconds_off, max(seconds_off, 2 * advantage))
        if self._since < APART or self._credit < advantage or advantage <= 0:
            return False
        self._credit -= advantage
        return True

    def observe(self, emitted: int, rows: int, guesses: int, seconds: float, seconds_off: float) -> None:
        """Learns from a step.

        Args:
            emitted: Tokens.
            rows: That emitted them.
            guesses: That were verified.
            seconds: Of the whole step.
            seconds_off: What it should have taken without guesses.
        """
        if not rows or seconds_off <= 0:
            return
        if not guesses:
            self._since = 0
            self._learn_plain(math.log(max(seconds, 1e-9) / seconds_off))
            return
        if self._plain < ENOUGH:
            return
        off = seconds_off * math.exp(self._log)
        saved = max((emitted / rows * off - seconds) / off, WORST)
        self._steps += 1
        rate = 1 / min(self._steps, STEPS)
        self.gain += rate * (saved - self.gain)
        self._square += rate * (saved * saved - self._square)
        if self._steps >= STEPS:
            self._judge()

    def _learn_plain(self, found: float) -> None:
        self._plain += 1
        error = found - self._log
        if self._plain > ENOUGH:
            error = min(max(error, -ODD), ODD)
        self._log += error / min(self._plain, PLAIN)

    def _judge(self) -> None:
        error = math.sqrt(max(0.0, self._square - self.gain**2) / (2 * STEPS - 1))
        if self.gain + SURE * error < 0:
            logger.info(
                "bets have cost %.0f%% of the time lately; they pause for %d plans", -100 * self.gain, self._pause
            )
            self._left, self._pause = self._pause, min(2 * self._pause, LONGEST)
            self.gain = self._square = 0.0
            self._steps = 0
        elif self.gain > SURE * error:
            self._pause = SHORTEST
