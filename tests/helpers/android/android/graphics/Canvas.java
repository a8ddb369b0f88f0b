package android.graphics;

public final class Canvas {
    private final Bitmap onto;

    public Canvas(Bitmap onto) { this.onto = onto; }

    public void drawColor(int argb) {
        for (float[] pixel : onto.pixels)
            for (int channel = 0; channel < 4; channel++)
                pixel[channel] = argb >>> (channel < 3 ? 16 - 8 * channel : 24) & 255;
    }

    /** Bilinear with exact weights, the picture's edge continued. */
    public void drawBitmap(Bitmap picture, Rect from, Rect to, Paint paint) {
        if (from != null || (paint.flags & Paint.FILTER_BITMAP_FLAG) == 0) throw new IllegalArgumentException();
        float across = (float) picture.width / (to.right - to.left), down = (float) picture.height / (to.bottom - to.top);
        for (int y = to.top; y < to.bottom; y++)
            for (int x = to.left; x < to.right; x++) {
                float column = (x - to.left + 0.5f) * across - 0.5f, row = (y - to.top + 0.5f) * down - 0.5f;
                float[] drawn = onto.pixels[y * onto.width + x], read = bilinear(picture, column, row);
                for (int channel = 0; channel < 4; channel++)
                    drawn[channel] = Math.round(read[channel] + drawn[channel] * (1 - read[3] / 255f));
            }
    }

    private static float[] bilinear(Bitmap picture, float column, float row) {
        int left = (int) Math.floor(column), top = (int) Math.floor(row);
        float[] found = new float[4];
        for (int corner = 0; corner < 4; corner++) {
            int x = left + corner % 2, y = top + corner / 2;
            float weight = (1 - Math.abs(column - x)) * (1 - Math.abs(row - y));
            int known = clamp(y, picture.height) * picture.width + clamp(x, picture.width);
            for (int channel = 0; channel < 4; channel++) found[channel] += weight * picture.pixels[known][channel];
        }
        return found;
    }

    private static int clamp(int place, int length) { return Math.max(0, Math.min(length - 1, place)); }
}
