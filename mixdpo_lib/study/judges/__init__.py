"""How good is a text? Three rewards, each by two judges."""
