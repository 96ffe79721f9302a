"""Measurements that anyone can repeat. Each module is a command: python -m benchmarks.NAME -h"""
