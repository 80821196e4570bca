"""From a campaign to a model that predicts: the paper's campaign, and any other."""
