"""FramePack as data: how history is packed, and in which order sections are made."""
