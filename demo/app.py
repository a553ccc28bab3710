"""The page of `gld-zoo demo` as a Hugging Face Space: open to strangers, so of listed models."""

from gld_zoo.demo import LAUNCH, build_page

demo = build_page(listed_only=True)

if __name__ == "__main__":
    demo.launch(**LAUNCH)
