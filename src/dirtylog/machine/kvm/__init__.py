"""Guests under KVM."""
