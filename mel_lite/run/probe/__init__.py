"""The probe before a run: can lessons help here, and which internalization fits?"""
