"""The ranks of one replica: how they keep together, talk, and notice that one is lost."""
