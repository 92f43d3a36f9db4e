"""The misuse we defend against, shipped so that protections can be measured; run it on pictures you may use."""
