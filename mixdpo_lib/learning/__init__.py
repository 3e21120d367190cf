"""How are experts and gate learned? Stochastic variational EM."""
