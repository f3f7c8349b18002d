"""Guests in the emulator Unicorn, for hosts without KVM."""
