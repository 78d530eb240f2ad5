"""What the accelerator computes, whatever the model: attention, rotary positions, layers."""
