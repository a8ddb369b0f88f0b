package android.graphics;

import java.awt.image.BufferedImage;
import java.io.IOException;
import java.io.OutputStream;
import javax.imageio.ImageIO;

/** The little of Android's graphics that a bundle's Kotlin uses, on a plain JVM: premultiplied pixels as floats. */
public final class Bitmap {
    public enum Config { ARGB_8888 }
    public enum CompressFormat { PNG }

    final int width, height;
    final float[][] pixels; // red, green, blue times alpha; alpha: 0 to 255

    Bitmap(int width, int height) {
        this.width = width;
        this.height = height;
        this.pixels = new float[width * height][4];
    }

    public int getWidth() { return width; }

    public int getHeight() { return height; }

    public static Bitmap createBitmap(int width, int height, Config config) { return new Bitmap(width, height); }

    public static Bitmap createBitmap(Bitmap from, int x, int y, int width, int height, Matrix turn, boolean filter) {
        boolean across = turn.a == 0;
        Bitmap made = new Bitmap(across ? height : width, across ? width : height);
        for (int row = 0; row < height; row++)
            for (int column = 0; column < width; column++) {
                float right = turn.a * (column - (width - 1) / 2f) + turn.b * (row - (height - 1) / 2f);
                float down = turn.c * (column - (width - 1) / 2f) + turn.d * (row - (height - 1) / 2f);
                int toX = Math.round(right + (made.width - 1) / 2f), toY = Math.round(down + (made.height - 1) / 2f);
                made.pixels[toY * made.width + toX] = from.pixels[(y + row) * from.width + x + column];
            }
        return made;
    }

    public boolean compress(CompressFormat format, int quality, OutputStream out) {
        BufferedImage image = new BufferedImage(width, height, BufferedImage.TYPE_INT_RGB);
        for (int place = 0; place < pixels.length; place++) {
            int rgb = 0;
            for (int channel = 0; channel < 3; channel++) rgb = rgb << 8 | Math.round(pixels[place][channel]);
            image.setRGB(place % width, place / width, rgb);
        }
        try {
            return ImageIO.write(image, "png", out);
        } catch (IOException error) {
            throw new IllegalStateException(error);
        }
    }
}
