"""Laws of the algebra, with torch as the oracle."""
