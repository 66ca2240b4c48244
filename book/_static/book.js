// Printing: the page is light and its folds are open, also from dark mode; afterwards all is as it was.
(() => {
  let theme, closed;

  window.addEventListener("beforeprint", () => {
    theme = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    closed = [...document.querySelectorAll("article details:not([open])")];
    closed.forEach((fold) => (fold.open = true));
  });

  window.addEventListener("afterprint", () => {
    document.documentElement.dataset.theme = theme;
    closed.forEach((fold) => (fold.open = false));
  });
})();

// Boxes that scroll can be reached by the keyboard, also after the window was made narrower.
(() => {
  const update = () => {
    const boxes = ".pst-scrollable-table-container, .text_html, .cell_output:has(> img), figure, pre";
    for (const box of document.querySelectorAll(`article :is(${boxes})`)) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  window.addEventListener("load", update);
  window.addEventListener("resize", update);
})();
