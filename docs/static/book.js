// What the theme and the notebooks' renderer leave out: search from disk, and what a keyboard or a screen reader needs.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
document.addEventListener("DOMContentLoaded", () => {
  const each = (selector, f) => document.querySelectorAll(selector).forEach(f);
  each("p.caption[role=heading]", p => p.setAttribute("aria-level", "2"));
  each("summary[aria-label]", s => s.removeAttribute("aria-label")); // its text says what it shows
  each("aside.sidebar-drawer", a => a.setAttribute("aria-label", "Chapters"));
  each("aside.toc-drawer", a => a.setAttribute("aria-label", "On this page"));
  const reach = () => each("pre, .table-wrapper, div.math", p => p.scrollWidth > p.clientWidth && p.setAttribute("tabindex", "0"));
  reach();
  addEventListener("resize", reach);
  each("details", d => d.addEventListener("toggle", reach));
});
