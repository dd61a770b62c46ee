"""Nodes and replicas: the controller says what should run where, agents see to it, replicas host engines."""
