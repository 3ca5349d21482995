"""y = fixed + per_unit * x, measured online: weighted least squares, drawn to a prior where x hardly varies.

Pure. Placement and admission predict with it: a prompt's time from its tokens, a step's from its sequences.
"""

from dataclasses import dataclass

LEAST = 3  # observations before anything is said
PRIOR = 0.02  # weight of the prior against the variance of x, as a share of its mean's square
LEAST_SHARE = 0.1  # of y that grows with x, where it should: a slope lost in noise is not none


@dataclass(slots=True)
class Line:
    """`proportional`: while every x is alike, y is taken for proportional to x, else for constant.

    Neither term is ever negative, and a proportional one is never without its slope. Source: recursive least squares
    with forgetting, in moments; the prior is a ridge.
    """

    proportional: bool
    weight: float = 0.05  # of the newest observation
    count: int = 0
    x: float = 0.0  # weighted means
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def see(self, x: float, y: float) -> None:
        self.count += 1
        # The first ones weigh alike: a mean, not a memory of whatever came first.
        weight = max(self.weight, 1 / self.count)
        self.x += weight * (x - self.x)
        self.y += weight * (y - self.y)
        self.xx += weight * (x * x - self.xx)
        self.xy += weight * (x * y - self.xy)

    @property
    def is_known(self) -> bool:
        return self.count >= LEAST

    def terms(self) -> tuple[float, float]:
        """(fixed, per unit); zeros before it is known."""
        if not self.is_known:
            return 0.0, 0.0
        prior = self.y / self.x if self.proportional and self.x > 0 else 0.0
        ridge = PRIOR * self.x * self.x
        spread = self.xx - self.x * self.x + ridge
        slope = (self.xy - self.x * self.y + ridge * prior) / spread if spread > 0 else 0.0
        slope = max(LEAST_SHARE * prior, slope)
        fixed = self.y - slope * self.x
        if fixed < 0:
            return 0.0, self.y / self.x if self.x > 0 else 0.0
        return fixed, slope
