// Renders the equations of each page that the theme shows; pymdownx.arithmatex marks them with \( \) and \[ \].
// KaTeX 0.19.1 lies beside this file, so that the pages load nothing from the network.
document$.subscribe(({ body }) => {
  renderMathInElement(body, {
    delimiters: [
      { left: "\\(", right: "\\)", display: false },
      { left: "\\[", right: "\\]", display: true },
    ],
  });
});
