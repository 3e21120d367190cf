"""What does a fitted mixture do when somebody plays with it? Needs the extra `lab`; the session alone does not."""

from .session import Comparison, Session

__all__ = ["Comparison", "Session"]
