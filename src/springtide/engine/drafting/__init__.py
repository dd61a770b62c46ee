"""Who guesses the tokens that come next, so that one step can check several."""
