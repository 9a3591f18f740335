"""The gManager, its ledger and plans, and the messages of a control round."""
