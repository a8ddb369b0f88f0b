// A photo as the model was trained to see it (device.json: image_size): upright, scaled bilinearly into a square, on
// black. png(square(photo, 256)) is what ask() and a llama-server take. Not run by Rankwise on a device.
import android.graphics.Bitmap
import android.graphics.BitmapFactory
import android.graphics.Canvas
import android.graphics.Color
import android.graphics.Matrix
import android.graphics.Paint
import android.graphics.Rect
import android.media.ExifInterface
import java.io.ByteArrayOutputStream

/** photo: the file's bytes, JPEG, PNG or WebP. */
fun square(photo: ByteArray, size: Int): Bitmap {
    val asStored = BitmapFactory.Options().apply { inScaled = false }
    val stored = requireNotNull(BitmapFactory.decodeByteArray(photo, 0, photo.size, asStored)) { "not a picture" }
    val note = ExifInterface(photo.inputStream()).getAttributeInt(ExifInterface.TAG_ORIENTATION, 1)
    val upright = upright(stored, note)
    val scale = minOf(size.toFloat() / upright.width, size.toFloat() / upright.height)
    val wide = if (upright.width >= upright.height) size else maxOf(1, (upright.width * scale).toInt())
    val tall = if (upright.height >= upright.width) size else maxOf(1, (upright.height * scale).toInt())
    val left = (size - wide) / 2
    val top = (size - tall) / 2
    val square = Bitmap.createBitmap(size, size, Bitmap.Config.ARGB_8888)
    val canvas = Canvas(square)
    canvas.drawColor(Color.BLACK)
    canvas.drawBitmap(upright, null, Rect(left, top, left + wide, top + tall), Paint(Paint.FILTER_BITMAP_FLAG))
    return square
}

/** BitmapFactory leaves EXIF's orientation alone. */
private fun upright(stored: Bitmap, note: Int): Bitmap {
    val turn = Matrix()
    when (note) {
        2 -> turn.setScale(-1f, 1f)
        3 -> turn.setRotate(180f)
        4 -> turn.setScale(1f, -1f)
        5 -> { turn.setRotate(90f); turn.postScale(-1f, 1f) }
        6 -> turn.setRotate(90f)
        7 -> { turn.setRotate(-90f); turn.postScale(-1f, 1f) }
        8 -> turn.setRotate(-90f)
        else -> return stored
    }
    return Bitmap.createBitmap(stored, 0, 0, stored.width, stored.height, turn, false)
}

fun png(picture: Bitmap): ByteArray {
    val out = ByteArrayOutputStream()
    picture.compress(Bitmap.CompressFormat.PNG, 100, out)
    return out.toByteArray()
}
