package android.graphics;

import java.awt.image.BufferedImage;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import javax.imageio.ImageIO;

public final class BitmapFactory {
    public static final class Options {
        public boolean inScaled = true;
    }

    public static Bitmap decodeByteArray(byte[] data, int offset, int length, Options options) throws IOException {
        if (options.inScaled) throw new IllegalArgumentException("scaled by the screen's density");
        BufferedImage image = ImageIO.read(new ByteArrayInputStream(data, offset, length));
        if (image == null) return null;
        Bitmap made = new Bitmap(image.getWidth(), image.getHeight());
        for (int place = 0; place < made.pixels.length; place++) {
            int argb = image.getRGB(place % made.width, place / made.width);
            float alpha = (argb >>> 24) / 255f;
            for (int channel = 0; channel < 3; channel++)
                made.pixels[place][channel] = Math.round((argb >>> 16 - 8 * channel & 255) * alpha);
            made.pixels[place][3] = argb >>> 24;
        }
        return made;
    }
}
