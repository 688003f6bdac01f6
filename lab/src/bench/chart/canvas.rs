//! The few SVG elements that the charts are made of. Whatever text comes in goes out escaped.

/// The page's styles. Classes instead of attributes, so that a dark surface can have other colours;
/// plain colours instead of variables, which not every viewer knows.
pub(super) const STYLE: &str = "
text { font: 12px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1c1b19; }
.page { fill: #f4f3ef; } .card { fill: #fdfdfb; stroke: #e2e0d9; }
.h1 { font-size: 24px; font-weight: 650; } .h2 { font-size: 15px; font-weight: 600; }
.soft { fill: #66645e; } .warn { fill: #b3261e; font-weight: 600; }
.grid { stroke: #e2e0d9; stroke-width: 1; } .track { fill: #edebe5; }
.mark { stroke: #1c1b19; stroke-width: 2; }
.f0 { fill: #2a6fd0; } .f1 { fill: #0f8f66; } .f2 { fill: #a9a69c; } .f3 { fill: #c9692a; } .f4 { fill: #7a5fc0; }
.l0 { stroke: #2a6fd0; } .l1 { stroke: #0f8f66; } .l2 { stroke: #a9a69c; stroke-dasharray: 5 4; }
.l3 { stroke: #c9692a; }
.line { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.met { fill: #0f7a4d; font-weight: 600; } .missed { fill: #b3261e; font-weight: 600; }
@media (prefers-color-scheme: dark) {
text { fill: #eceae4; } .page { fill: #161614; } .card { fill: #201f1d; stroke: #3a3935; }
.soft { fill: #a8a69e; } .warn, .missed { fill: #ff8a80; } .met { fill: #57d39a; }
.grid { stroke: #3a3935; } .track { fill: #2f2e2a; } .mark { stroke: #eceae4; }
.f0 { fill: #5b9bf0; } .f1 { fill: #35bd8d; } .f2 { fill: #77756d; } .f3 { fill: #e5935a; } .f4 { fill: #a58be6; }
.l0 { stroke: #5b9bf0; } .l1 { stroke: #35bd8d; } .l2 { stroke: #8b8981; } .l3 { stroke: #e5935a; }
}
";

/// Which end of a text its position is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A part of a drawing, in coordinates of its own, and how high it is.
#[derive(Debug, Default)]
pub(super) struct Canvas {
    elements: String,
    pub(super) height: f64,
}

impl Canvas {
    pub(super) fn text(&mut self, x: f64, y: f64, class: &str, anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escaped(text);
        self.put(&format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"{class}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    /// A rectangle: where, and how large.
    pub(super) fn rect(&mut self, at: (f64, f64), size: (f64, f64), class: &str, radius: f64) {
        let ((x, y), (width, height)) = (at, size);
        self.put(&format!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" \
             rx=\"{radius}\" class=\"{class}\"/>"
        ));
    }

    pub(super) fn line(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.put(&format!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" class=\"{class}\"/>"
        ));
    }

    /// A line through points.
    pub(super) fn path(&mut self, points: &[(f64, f64)], class: &str) {
        let points: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.put(&format!("<polyline points=\"{}\" class=\"line {class}\"/>", points.join(" ")));
    }

    /// A dot, with a text that appears when somebody points at it.
    pub(super) fn dot(&mut self, (x, y): (f64, f64), class: &str, tip: &str) {
        let tip = escaped(tip);
        self.put(&format!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" class=\"{class}\"><title>{tip}</title></circle>"
        ));
    }

    /// Coloured squares with what they stand for, side by side.
    pub(super) fn legend(&mut self, y: f64, entries: &[(&str, &str)]) {
        let mut x = 0.0;
        for (class, text) in entries {
            self.rect((x, y - 9.0), (10.0, 10.0), class, 2.0);
            self.text(x + 15.0, y, "soft", Anchor::Start, text);
            x += 33.0 + 6.6 * length(text);
        }
    }

    /// Another drawing inside this one.
    pub(super) fn place(&mut self, x: f64, y: f64, part: &Self) {
        self.put(&format!("<g transform=\"translate({x:.1} {y:.1})\">\n{}</g>", part.elements));
    }

    /// The whole file.
    pub(super) fn document(&self, width: f64, title: &str) -> String {
        let (height, title) = (self.height, escaped(title));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
             viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\">\n<title>{title}</title>\n\
             <style>{STYLE}</style>\n{}</svg>\n",
            self.elements
        )
    }

    fn put(&mut self, element: &str) {
        self.elements.push_str(element);
        self.elements.push('\n');
    }
}

/// Characters as a number to calculate with.
fn length(text: &str) -> f64 {
    text.chars().map(|_| 1.0).sum()
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // XML forbids most control characters, even as references.
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        assert_eq!(escaped("a<b>&\"'\u{1b}"), "a&lt;b&gt;&amp;&quot;&#39;\u{fffd}");
        let mut canvas = Canvas::default();
        canvas.text(0.0, 0.0, "soft", Anchor::End, "</text><script>");
        assert!(!canvas.document(10.0, "<x>").contains("<script>"));
    }
}
