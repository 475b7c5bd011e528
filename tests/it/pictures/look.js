// Looks at the page in the frame and writes down what a reader sees of it.
window.onload = () => {
  const view = document.querySelector("iframe").contentWindow;
  const doc = view.document;
  const all = (selector, from = doc) => [...from.querySelectorAll(selector)];
  const box = (element) => element.getBoundingClientRect();
  const meet = (a, b) =>
    a.left < b.right - 0.5 && b.left < a.right - 0.5 && a.top < b.bottom - 0.5 && b.top < a.bottom - 0.5;
  const within = (inner, outer) =>
    inner.left >= outer.left - 0.5 && inner.right <= outer.right + 0.5 &&
    inner.top >= outer.top - 0.5 && inner.bottom <= outer.bottom + 0.5;
  const said = (element) => element.textContent.trim().slice(0, 80);

  const luminance = (color) => {
    const [r, g, b] = color.match(/[\d.]+/g).slice(0, 3).map((part) => {
      const c = part / 255;
      return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const background = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const rect = at.matches("g.card") && at.querySelector("rect");
      if (rect) return view.getComputedStyle(rect).fill;
      const color = view.getComputedStyle(at).backgroundColor;
      if (!color.startsWith("rgba(0, 0, 0, 0")) return color;
    }
    return "rgb(255, 255, 255)";
  };

  const svg = doc.querySelector("svg");
  const cards = all("g.card");
  const rects = cards.map((card) => card.querySelector("rect"));
  const labels = all("svg text.label");
  const overlapping = [];
  rects.forEach((a, at) => rects.slice(0, at).forEach((b, to) => {
    if (meet(box(a), box(b))) overlapping.push([said(cards[at]), said(cards[to])]);
  }));
  labels.forEach((a, at) => {
    rects.forEach((b, to) => {
      if (meet(box(a), box(b))) overlapping.push([said(a), said(cards[to])]);
    });
    labels.slice(0, at).forEach((b) => {
      if (meet(box(a), box(b))) overlapping.push([said(a), said(b)]);
    });
  });
  const spilling = [];
  cards.forEach((card, at) => {
    const texts = all("text", card);
    texts.forEach((text, place) => {
      if (!within(box(text), box(rects[at]))) spilling.push(said(text));
      texts.slice(0, place).forEach((other) => {
        if (meet(box(text), box(other))) spilling.push([said(text), said(other)]);
      });
    });
    if (!within(box(rects[at]), box(svg))) spilling.push(said(card));
  });
  all("g.link path").forEach((path) => {
    if (!within(box(path), box(svg))) spilling.push(path.getAttribute("d"));
  });
  // Opened, so that what is in it has a place.
  all("details").forEach((details) => { details.open = true; });
  const pale = all("h1, h2, p, li, th, td, pre, summary, span, svg text").flatMap((element) => {
    const style = view.getComputedStyle(element);
    const color = element.closest("svg") ? style.fill : style.color;
    const ratio = contrast(color, background(element));
    return said(element) && ratio < 4.5 ? [[said(element), color, background(element), ratio]] : [];
  });
  document.getElementById("facts").textContent = JSON.stringify({
    title: doc.title,
    cards: cards.map((card) => said(card.querySelector("text.name"))),
    links: all("g.link").length,
    labels: labels.length,
    dashed: all("g.link.soft").length,
    rows: all("tbody tr[id]").length,
    overlapping, spilling, pale,
    dead_ends: all("a[href]").filter((a) => !doc.getElementById(a.getAttribute("href").slice(1))).length,
    // The browser resolves what is drawn: no arrow without its tip.
    tips: all("g.link path").filter((path) => view.getComputedStyle(path).markerEnd === "none").length,
    scrolls_sideways: doc.documentElement.scrollWidth > doc.documentElement.clientWidth,
    scripts: all("script, iframe, object, embed, img, link").length,
    requests: view.performance.getEntriesByType("resource").map((entry) => entry.name),
    background: view.getComputedStyle(doc.body).backgroundColor,
    text: doc.body.innerText,
    drawing: svg ? svg.textContent : "",
  });
};
